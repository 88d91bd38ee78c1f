"""Alembic's entry: uses the connection that ``db.migrations.run`` (or a developer's script) hands over."""

from alembic import context

from db.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes columns by copying the table
    transaction_per_migration=False,
)
context.run_migrations()
