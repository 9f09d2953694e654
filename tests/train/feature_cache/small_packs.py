"""`python -m vlm` with packs of a few pictures."""

from vlm.cli.train import main
from vlm.train.feature_cache import writer as filling

filling.VIEWS_PER_PACK = 4

if __name__ == "__main__":
    main()
