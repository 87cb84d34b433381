"""A run's configuration: typed, checked, read from YAML."""
