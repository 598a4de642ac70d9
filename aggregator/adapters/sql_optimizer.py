"""The part of the SQL repository that holds what server optimizers remember."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select

from aggregator.adapters import sql_schema as s
from aggregator.records import OptimizerMemory


class OptimizerReader:
    """What can be read of it; see `aggregator.repository.Reader`."""

    _connection: Connection

    def optimizer_memory(self, campaign_id: str) -> OptimizerMemory | None:
        """What a campaign's optimizer remembers."""
        table = s.optimizer_memories
        row = self._connection.execute(select(table).where(table.c.campaign_id == campaign_id)).one_or_none()
        return None if row is None else OptimizerMemory(**row._asdict())


class OptimizerWriter(OptimizerReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def keep_optimizer_memory(self, memory: OptimizerMemory) -> None:
        """Replaces what a campaign's optimizer remembers."""
        self.forget_optimizer_memory(memory.campaign_id)
        self._connection.execute(insert(s.optimizer_memories).values(**vars(memory)))

    def forget_optimizer_memory(self, campaign_id: str) -> None:
        """Erases it."""
        table = s.optimizer_memories
        self._connection.execute(delete(table).where(table.c.campaign_id == campaign_id))
