"""Questions about generated images, by ability: what a finetune may make a model forget."""
