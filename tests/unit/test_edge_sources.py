"""Sources of examples: how readings become windows; files, databases and plug-ins of the owner."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import time
import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.adapters.data import open_npz
from edge_client.adapters.sources import Sources, open_sources
from edge_client.adapters.sources.csv_files import open_csv
from edge_client.adapters.sources.sqlite_table import open_sqlite
from edge_client.configuration import EdgeConfiguration, InvalidConfiguration
from edge_client.main import main
from edge_client.windows import NO_LABEL, Readings, ReadingsBuilder, WindowSettings, examples_of
from models.examples import Examples, InvalidExamples
from models.manifest import InputSpec, ModelManifest, TargetSpec
from tests.edge_broker import Fleet
from tests.edge_fleet import PERMISSIVE, manifest
from tests.unit.test_edge_cli import install_watch

NOW = 1_800_000_000.0


def taking(*shape: int) -> ModelManifest:
    """The test model with another input."""
    channels = (0.0,) * shape[-1]
    return manifest().model_copy(
        update={"input": InputSpec(shape=shape, mean=channels, std=tuple(1.0 for _ in channels))}
    )


def predicting(count: int, *shape: int) -> ModelManifest:
    """The test model, predicting values."""
    labels = tuple(f"value-{i}" for i in range(count))
    return taking(*shape).model_copy(
        update={
            "loss": "huber",
            "labels": labels,
            "target": TargetSpec(shape=(count,), dtype="float32", mean=(0.0,) * count, std=(1.0,) * count),
        }
    )


def readings(rows: list[tuple[float, list[float], str | None]]) -> Readings:
    builder = ReadingsBuilder(len(rows[0][1]), 1000)
    for row in rows:
        builder.add(*row)
    return builder.readings()


def settings(**keys: Any) -> WindowSettings:
    return WindowSettings.of({"channels": ["a", "b"], "label": "label"} | keys, "data")


def steady(count: int, label: str = "left") -> list[tuple[float, list[float], str | None]]:
    return [(NOW + i, [float(i), -float(i)], label) for i in range(count)]


# --- windows ---------------------------------------------------------------------------------------------


def test_windows_are_as_long_as_the_model_s_input() -> None:
    found = examples_of(readings(steady(10)), settings(stride=2), taking(4, 2))
    assert found.x.shape == (4, 4, 2) and found.y.tolist() == [0, 0, 0, 0]
    assert found.x[1].tolist() == [[2, -2], [3, -3], [4, -4], [5, -5]]
    assert len(examples_of(readings(steady(10)), settings(), taking(4, 2))) == 2
    assert examples_of(readings(steady(10)), settings(), taking(4, 2, 1)).x.shape == (2, 4, 2, 1)
    # A reading by itself, and a window of one channel.
    assert examples_of(readings(steady(10)), settings(), taking(2)).x.shape == (10, 2)
    one = [(t, values[:1], label) for t, values, label in steady(10)]
    assert examples_of(readings(one), settings(channels=["a"]), taking(5)).x.tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]
    with pytest.raises(InvalidExamples, match="channels"):
        examples_of(readings(steady(10)), settings(), taking(4, 3))
    assert len(examples_of(readings(steady(3)), settings(), taking(4, 2))) == 0


def test_no_window_spans_a_gap_a_hole_or_a_change_of_label() -> None:
    rows = steady(12)
    later = [(when + 100, values, label) for when, values, label in rows]
    both = readings(rows[:6] + later[6:])
    found = examples_of(both, settings(max_gap_seconds=5), taking(4, 2))
    # Windows begin anew after the gap.
    assert found.x[:, 0, 0].tolist() == [0, 6]
    assert len(examples_of(both, settings(), taking(4, 2))) == 3
    # A clock that was set back is a gap in any case.
    earlier = [(when - 100, values, label) for when, values, label in rows]
    back = readings(rows[:6] + earlier[6:])
    assert examples_of(back, settings(), taking(4, 2)).x[:, 0, 0].tolist() == [0, 6]
    rows[5] = (rows[5][0], [float("nan"), 0.0], "left")
    assert examples_of(readings(rows), settings(), taking(4, 2)).x[:, 0, 0].tolist() == [0, 8]
    rows = steady(6) + [(NOW + 6 + i, [6.0 + i, 0.0], "right" if i > 1 else None) for i in range(8)]
    found = examples_of(readings(rows), settings(stride=1), taking(4, 2))
    assert list(zip(found.x[:, 0, 0].tolist(), found.y.tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
        (2, 0),
        (8, 1),
        (9, 1),
        (10, 1),
    ]


def test_labels_of_the_data_become_the_model_s() -> None:
    rows = [*steady(4, "L"), *steady(4, "1"), *steady(4, "resting")]
    keys: dict[str, Any] = {"classes": {"L": "left", "resting": ""}}
    assert examples_of(readings(rows), settings(**keys), taking(4, 2)).y.tolist() == [0, 1]
    with pytest.raises(InvalidExamples, match=r"'resting' is none of watch's \(left, right\)"):
        examples_of(readings(rows), settings(classes={"L": "left"}), taking(4, 2))
    with pytest.raises(InvalidExamples, match="targets"):
        examples_of(readings(rows), settings(), predicting(1, 4, 2))


def test_values_to_come_are_targets() -> None:
    keys = {"label": None, "targets": ["b", "c"], "channels": ["a", "b"], "ahead": 3, "stride": 1}
    rows: list[tuple[float, list[float], str | None]] = [
        (NOW + i, [i, 10 + i, 20 + i], None) for i in range(10)
    ]
    rows[8] = (NOW + 8, [8, 18, float("nan")], None)
    found = examples_of(readings(rows), settings(**keys), predicting(2, 4, 2))
    # The target that is missing takes its window with it; no channel is missing there.
    assert found.x[:, 0, 0].tolist() == [0, 1, 3] and found.x.shape == (3, 4, 2)
    assert found.y.tolist() == [[16, 26], [17, 27], [19, 29]] and found.y.dtype == np.float32
    with pytest.raises(InvalidExamples, match="targets"):
        examples_of(readings(rows), settings(**keys), predicting(3, 4, 2))
    with pytest.raises(InvalidExamples, match="label"):
        examples_of(readings(rows), settings(**keys), taking(4, 2))


def test_limits_keep_the_latest() -> None:
    found = examples_of(readings(steady(40)), settings(max_examples=3), taking(4, 2))
    assert found.x[:, 0, 0].tolist() == [28, 32, 36]
    found = examples_of(readings(steady(40)), settings(), taking(4, 2), oldest=NOW + 32)
    assert found.x[:, 0, 0].tolist() == [32, 36]
    builder = ReadingsBuilder(1, 5)
    for i in range(1000):
        builder.add(float(i), [float(i)], None)
        assert len(builder) < 10
    kept = builder.readings()
    assert kept.times[-5:].tolist() == [995, 996, 997, 998, 999] == kept.values[-5:, 0].tolist()
    assert set(kept.codes.tolist()) == {NO_LABEL}
    assert settings(max_examples=3, stride=2).rows(taking(4, 2)) == 8


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"label": None}, "label"),
        ({"targets": ["b"]}, "label"),
        ({"ahead": 2}, "ahead"),
        ({"channels": []}, "channels"),
        ({"channels": ["a", "a"]}, "twice"),
        ({"max_example": 3}, "max_example"),
        ({"stride": 0}, "stride"),
        ({"max_age_days": "30"}, "max_age_days"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidConfiguration, match=match):
        settings(**keys)


# --- files of the owner ----------------------------------------------------------------------------------


def csv_source(path: Path, **keys: Any) -> Any:
    given = {"path": str(path), "channels": ["x", "y"], "label": "what", "time": "when"} | keys
    return open_csv(given, path / "unused")


def test_csv_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = csv_source(tmp_path / "nowhere")
    assert source.fault().code == "no-data"
    source = csv_source(tmp_path)
    assert source.fault().code == "no-data"
    header = "\ufeffwhen,y,x,note,what\n"
    body = "".join(f"2027-01-15T08:00:0{i}Z,{-i},{i},..., left \n" for i in range(4))
    (tmp_path / "b.csv").write_text(header + body + "2027-01-15T08:00:05Z,1")
    (tmp_path / "a.csv").write_text(header + body.replace("left", "right"))
    assert source.fault() is None
    found = source.load(taking(4, 2))
    assert found.y.tolist() == [1, 0]
    assert found.x[0].tolist() == [[0, 0], [1, -1], [2, -2], [3, -3]]
    # The half line at the end of a file is one that is being written.
    with (tmp_path / "b.csv").open("a") as file:
        file.write("\n2027-01-15T08:00:06Z,1,1,...,left\n")
    with pytest.raises(InvalidExamples, match=r"b\.csv, line 6"):
        source.load(taking(4, 2))


def test_half_a_number_at_the_end_of_a_csv_file_is_none(tmp_path: Path) -> None:
    rows = "when,x,y,what\n1,2,3,left\n2,3,4,left\n"
    for end in ("3,5,12", "3,5,12.5,lef", '3,5,"12'):
        (tmp_path / "a.csv").write_text(rows + end)
        examples = csv_source(tmp_path).load(taking(2))
        assert examples.x.tolist() == [[2.0, 3.0], [3.0, 4.0]]
    (tmp_path / "a.csv").write_text(rows + "3,5,12.5,left\r\n")
    assert csv_source(tmp_path).load(taking(2)).x.tolist()[-1] == [5.0, 12.5]


def test_a_csv_file_with_another_header_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("when,x,z,what\n1,2,3,left\n")
    with pytest.raises(
        InvalidExamples, match=r"a\.csv has 0 columns called y; its header is when, x, z, what"
    ):
        csv_source(tmp_path).load(taking(2))
    (tmp_path / "a.csv").write_text("when,x,y,what\n1,2,3,left\n2,warm,3,left\n")
    with pytest.raises(InvalidExamples, match=r"a\.csv, line 3"):
        csv_source(tmp_path).load(taking(2))
    (tmp_path / "a.csv").write_text("when,x,y,what\nyesterday,2,3,left\n")
    with pytest.raises(InvalidExamples, match=r"a\.csv, line 2"):
        csv_source(tmp_path).load(taking(2))
    (tmp_path / "a.csv").write_text("when,x,y,what\n1,,3,left\n")
    with pytest.raises(InvalidExamples, match="no whole window"):
        csv_source(tmp_path).load(taking(2))


def test_limits_on_files_use_the_latest_and_delete_nothing(tmp_path: Path) -> None:
    for number in range(5):
        path = tmp_path / f"{number}.csv"
        path.write_text("x,y,what\n" + f"{number},0,left\n" * 100)
        np.savez(
            tmp_path / f"{number}.npz",
            x=np.full((100, 2), number, np.float32),
            y=np.zeros(100, np.int32),
        )
        os.utime(path, (time.time() - (5 - number) * 86_400,) * 2)
        os.utime(path.with_suffix(".npz"), (time.time() - (5 - number) * 86_400,) * 2)
    size = (tmp_path / "0.csv").stat().st_size

    def csv(**keys: Any) -> list[float]:
        return sorted(set(csv_source(tmp_path, time=None, **keys).load(taking(2)).x[:, 0].tolist()))

    def npz(**keys: Any) -> list[float]:
        return sorted(
            set(open_npz({"path": str(tmp_path), **keys}, tmp_path).load(taking(2)).x[:, 0].tolist())
        )

    assert csv() == npz() == [0, 1, 2, 3, 4]
    assert csv(max_examples=150) == npz(max_examples=150) == [3, 4]
    assert csv(max_age_days=2.5) == npz(max_age_days=2.5) == [3, 4]
    assert csv(max_megabytes=2.5 * size / 1e6) == [3, 4]
    assert len(open_npz({"path": str(tmp_path), "max_examples": 150}, tmp_path).load(taking(2))) == 150
    assert len(list(tmp_path.glob("*"))) == 10
    with pytest.raises(InvalidConfiguration, match="path"):
        open_npz({"path": "relative"}, tmp_path)


def database(path: Path, rows: list[tuple[Any, ...]]) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute('CREATE TABLE "my readings" (at, x REAL, "y ""axis""" REAL, what TEXT)')
        connection.executemany('INSERT INTO "my readings" VALUES (?, ?, ?, ?)', rows)
    connection.close()


def table_source(path: Path, **keys: Any) -> Any:
    columns = ["x", 'y "axis"']
    given = {"path": str(path), "table": "my readings", "time": "at", "channels": columns, "label": "what"}
    return open_sqlite(given | keys, path / "unused")


def test_a_table_gives_its_latest_rows_in_the_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "home.sqlite"
    assert table_source(path).fault().code == "no-data"
    now = time.time()
    rows = [(now + 1000 * (i - 20), float(i), None if i == 30 else 1.0, "left") for i in range(40)]
    database(path, rows[::-1])
    source = table_source(path, max_examples=4)
    assert source.fault() is None
    found = source.load(taking(4, 2))
    assert found.x[:, 0, 0].tolist() == [24, 32, 36]
    assert len(table_source(path, max_age_days=10_500 / 86_400).load(taking(2))) == 29
    before = path.read_bytes()
    with pytest.raises(InvalidExamples, match="no number"):
        table_source(path, channels=["x", "what"]).load(taking(4, 2))
    assert path.read_bytes() == before


def test_a_table_that_changed_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "home.sqlite"
    database(path, [(NOW + i, 1.0, 1.0, "left") for i in range(4)])
    source = table_source(path)
    assert len(source.load(taking(4, 2))) == 1
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute('ALTER TABLE "my readings" RENAME COLUMN x TO acceleration')
    connection.close()
    with pytest.raises(InvalidExamples, match=r"no x in my readings .* acceleration"):
        source.load(taking(4, 2))
    with pytest.raises(InvalidExamples, match="no such table"):
        table_source(path, table="my readings; DROP").load(taking(4, 2))
    path.write_bytes(b"no database at all, and long enough to be told from one" * 10)
    with pytest.raises(InvalidExamples, match="cannot be read"):
        source.load(taking(4, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_table_is_read_while_another_program_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "home.sqlite"
    database(path, [(NOW + i, 1.0, 1.0, "left") for i in range(4)])
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("BEGIN IMMEDIATE")
    writer.execute('INSERT INTO "my readings" SELECT at + 4, x, "y ""axis""", what FROM "my readings"')
    assert len(table_source(path).load(taking(4, 2))) == 1
    writer.execute("COMMIT")
    assert len(table_source(path).load(taking(4, 2))) == 2
    writer.close()


# --- edge.toml and plug-ins ------------------------------------------------------------------------------


def opened(state: Path, text: str) -> Sources:
    return open_sources(EdgeConfiguration.from_bytes(text.encode()).data, state)


def test_tables_are_chosen_by_model_and_joined(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2), ("other", 3)):
        (tmp_path / name).mkdir()
        x = np.full((2, 3), value, np.float32)
        Examples("device", x, np.zeros(2, np.int32)).save(tmp_path / name / "some.npz")
    text = "".join(
        f'[[data]]\nsource = "npz"\nname = "{name}"\npath = "{tmp_path / name}"\n{more}\n'
        for name, more in (("two", ""), ("one", 'model = "watch"'), ("other", 'model = "bulb"'))
    )
    sources = opened(tmp_path, text)
    assert sources.fault() is None
    assert sources.load(manifest()).x[:, 0].tolist() == [2, 2, 1, 1]
    assert sources.load(manifest(name="bulb")).x[:, 0].tolist() == [2, 2, 3, 3]
    (tmp_path / "two" / "some.npz").unlink()
    assert sources.fault() is None
    with pytest.raises(InvalidExamples, match="data two"):
        sources.load(manifest())
    only = opened(tmp_path, f'[[data]]\nsource="npz"\nmodel="bulb"\npath="{tmp_path / "two"}"')
    fault = only.fault()
    assert fault is not None and fault.code == "no-data"
    with pytest.raises(InvalidExamples, match="for the model watch"):
        only.load(manifest())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[[data]", "no TOML"),
        ("\xff", "no TOML"),
        ("x = 1", "x: "),
        ("[[data]]", "data.0.source"),
        ("[[data]]\nsource = 'npz'", r"data \(npz\)\.path"),
        ("[[data]]\nsource = 'npz'\npath = '/srv'\npasth = '/x'", "pasth"),
        ("[[data]]\nsource = 'csw'\npath = '/srv'", "no source csw; known are csv, iio, mqtt, npz, sqlite"),
        ("[[data]]\nsource='npz'\npath='/a'\n[[data]]\nsource='npz'\npath='/b'", "two tables"),
        ("#" * 70_000, "bytes"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_where(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(InvalidConfiguration, match=match):
        open_sources(EdgeConfiguration.from_bytes(text.encode("latin-1")).data, tmp_path)


def test_the_command_line_takes_data_from_edge_toml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    install_watch(state)
    personalise = ["personalise", "--state", str(state)]
    assert main(personalise) == 1
    assert "[[data]]" in capsys.readouterr().err
    (state / "edge.toml").write_text("[[data]]\nsource = 'npz'\npath = '/nowhere/at/all'\n")
    assert main(personalise) == 1
    assert "not there" in capsys.readouterr().err
    (state / "edge.toml").write_text("[[data]]\nsource = 'npz'\n")
    assert main(personalise) == 1
    assert f"{state / 'edge.toml'}: " not in (said := capsys.readouterr().err) and "data (npz).path" in said
    assert main([*personalise, "--config", str(tmp_path / "none.toml")]) == 1
    assert "no configuration file" in capsys.readouterr().err


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "data-sources.md"


def test_the_plug_in_of_the_manual_works_as_another_package(tmp_path: Path) -> None:
    """A distribution made of the manual's own files, found by its entry point in a fresh interpreter."""
    blocks = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL))
    project = tomllib.loads(blocks["pyproject.toml"])["project"]
    site, state = tmp_path / "site", tmp_path / "state"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["covey.data"].items()
    (info / "entry_points.txt").write_text("[covey.data]\n" + "".join(f"{k} = {v}\n" for k, v in points))
    (site / "counter_source.py").write_text(blocks["counter_source.py"])
    (tmp_path / "edge.toml").write_text(blocks["edge.toml"])
    (tmp_path / "manifest.json").write_bytes(predicting(1, 4, 1).to_bytes())
    code = (
        "import sys; from pathlib import Path\n"
        "from edge_client.adapters.sources import open_sources\n"
        "from edge_client.configuration import EdgeConfiguration\n"
        "from models.manifest import ModelManifest\n"
        "tables = EdgeConfiguration.from_bytes(Path(sys.argv[1]).read_bytes()).data\n"
        "model = ModelManifest.from_bytes(Path(sys.argv[3]).read_bytes())\n"
        "found = open_sources(tables, Path(sys.argv[2])).load(model)\n"
        "print(found.x.shape, found.y[:2].tolist())\n"
    )

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": f"{site}:{Path(__file__).parents[2]}"}
        argv = [sys.executable, "-c", code, str(path), str(state), str(tmp_path / "manifest.json")]
        return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)

    done = run(tmp_path / "edge.toml")
    assert done.stdout == "(24, 4, 1) [[4.0], [8.0]]\n", done.stderr
    (tmp_path / "bad.toml").write_text(blocks["edge.toml"].replace("counts", "count"))
    assert "data (counter).counts: Field required" in run(tmp_path / "bad.toml").stderr
    (site / "counter_source.py").write_text("import nothing_like_that")
    assert "counter_source" in run(tmp_path / "edge.toml").stderr
