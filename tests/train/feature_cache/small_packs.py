"""`python -m vlm` with packs of a few images."""

from vlm.cli.train import main
from vlm.train.feature_cache import images

images.VIEWS_PER_PACK = 4

if __name__ == "__main__":
    main()
