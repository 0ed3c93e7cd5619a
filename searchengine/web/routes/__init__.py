"""What can be asked of the service, a module a topic; each has a `router`."""
