"""The endpoint: requests over HTTP in OpenAI's form, checked and bounded, answered by the engine or by heads.

`app` puts it together, `server` listens; `chat`, `classify` and `embeddings` answer one path each. `gate`, `body`,
`admission`, `images` and `validation` refuse what must not reach a model. To serve another path, write a `respond`
function beside these and add it to the table in `app`.
"""
