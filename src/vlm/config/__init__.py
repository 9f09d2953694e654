"""The configuration: a typed schema with the allowed values of each field, and the YAML files of runs and groups."""
