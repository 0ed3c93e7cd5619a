"""Names -> encoders. `registry` is the place to look first."""
