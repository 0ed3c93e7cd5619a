"""What `verify` looks at: one module a part of the index."""
