"""The configuration: a typed schema with the rule of each field, and the YAML files that fill it."""
