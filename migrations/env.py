"""Alembic's entry: runs the revisions over the connection that `server.db.migrate` opened."""

from alembic import context

from server.db.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
context.run_migrations()
