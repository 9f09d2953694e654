"""The configuration: a typed schema, the YAML files that fill it, and the checks between its fields."""
