"""Data: one in-memory form, readers of formats, templates, encoding to ids and labels, collation and sampling."""
