"""The small encoder that installs from the package registry: two frozen towers, two small heads trained by us."""
