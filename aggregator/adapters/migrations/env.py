"""What Alembic runs: the migrations, in the transaction that `sql_migration.migrate` has begun."""

from __future__ import annotations

from alembic import context

from aggregator.adapters.sql_schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot change a column: the table is built anew instead.
    render_as_batch=True,
)
context.run_migrations()
