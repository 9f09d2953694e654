"""Computing the features of frozen parts once, of images and for prediction heads, and training on them."""
