"""`python -m vlm` with pieces of the vocabulary so small that a tiny model's batches have several of them."""

from vlm.cli.train import main
from vlm.models import text_loss

text_loss.MAX_LOGITS = 3000

if __name__ == "__main__":
    main()
