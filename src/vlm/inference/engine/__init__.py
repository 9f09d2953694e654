"""Answers to many at once: requests join a running batch between two tokens, and leave it when they end.

`engine` takes requests from an event loop, `options` says what a request asks and gets, `constraints` keeps an answer
to a JSON schema or a grammar.
"""
