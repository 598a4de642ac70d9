"""The part of the SQL repository that holds the keys of noise trees."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from aggregator.adapters import sql_schema as s
from aggregator.records import NoiseTree
from aggregator.repository import NotFound


class NoiseReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def noise_tree(self, campaign_id: str) -> NoiseTree | None:
        """The present tree of a campaign."""
        query = select(s.noise_trees).where(s.noise_trees.c.campaign_id == campaign_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else NoiseTree(**row._asdict())


class NoiseWriter(NoiseReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def plant_noise_tree(self, tree: NoiseTree) -> None:
        """Replaces a campaign's tree."""
        self.fell_noise_tree(tree.campaign_id)
        self._connection.execute(insert(s.noise_trees).values(**vars(tree)))

    def note_leaf_released(self, campaign_id: str, leaf: int) -> None:
        """Moves on to a later leaf."""
        table = s.noise_trees
        statement = update(table).where(table.c.campaign_id == campaign_id, table.c.released < leaf)
        if self._connection.execute(statement.values(released=leaf)).rowcount == 0:
            raise NotFound(f"campaign {campaign_id} has no noise tree in which leaf {leaf} follows")

    def fell_noise_tree(self, campaign_id: str) -> None:
        """Erases a campaign's tree."""
        self._connection.execute(delete(s.noise_trees).where(s.noise_trees.c.campaign_id == campaign_id))
