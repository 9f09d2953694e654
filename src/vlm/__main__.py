"""`python -m vlm`, `deepspeed --module vlm` and `torchrun -m vlm`: hands over to `vlm.cli`."""

from vlm.cli.main import main

if __name__ == "__main__":
    main()
