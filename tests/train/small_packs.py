"""`python -m vlm` with packs of a few pictures."""

from vlm.__main__ import main
from vlm.train import filling

filling.PACK_VIEWS = 4

if __name__ == "__main__":
    main()
