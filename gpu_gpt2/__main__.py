"""`python -m gpu_gpt2` is the command gpu-gpt2."""

from gpu_gpt2.cli.app import main

if __name__ == "__main__":  # not in the processes that data prepare starts
    main()
