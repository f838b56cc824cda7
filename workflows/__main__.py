"""`python -m workflows` is `ddpm`: the form to use on a cluster, where the project's root comes first on the path."""

from workflows.cli import main

if __name__ == "__main__":
    main()
