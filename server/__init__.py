"""The service: HTTP, SQL and processes. Only `server.daemon` imports the engine; nothing else here knows tensors."""
