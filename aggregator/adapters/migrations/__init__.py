"""Migrations of the SQL repository, run by `aggregator.adapters.sql_migration`."""
