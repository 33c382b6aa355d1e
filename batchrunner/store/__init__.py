"""Batches, tasks and extents in SQL: the only package that knows SQLAlchemy."""
