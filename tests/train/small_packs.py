"""`python -m vlm` with packs of a few pictures, and ranks that hear every second of a lock that another run has."""

from vlm.__main__ import main
from vlm.train import filling, ranks

filling.PACK_VIEWS = 4
ranks.PATIENCE = 1.0

if __name__ == "__main__":
    main()
