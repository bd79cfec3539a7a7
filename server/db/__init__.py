"""Every SQL statement of the service, one file a noun."""
