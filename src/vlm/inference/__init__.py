"""Using a trained model: generating, chatting, predicting, serving."""
