"""Answers to many at once: requests join a running batch between two tokens, and leave it when they end.

`engine` takes requests from an event loop and decides which rows run, `batch` computes their next tokens, with
`cache`; `row` is one answer while it is generated, with its `sampling` and its `text`. `options` says what a request
asks and gets, `constraints` keeps an answer to a JSON schema or a grammar.
"""
