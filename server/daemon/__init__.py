"""The engine daemon: the one room where database, scheduler and engine meet. Decide, do, record."""
