"""The index on disk: its layout, its tables, and the read-only view that searches use."""
