"""The web page `vlm web`: asking models, training them and looking through data in a browser."""
