"""`python -m vlm.demo`: runs `vlm.demo.main`."""

from vlm.demo.main import main

if __name__ == "__main__":
    main()
