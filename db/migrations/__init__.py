"""Alembic revisions, one file each in ``versions``; ``run.migrate`` applies them under a lock."""
