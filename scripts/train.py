"""Learn a stream of tasks: `accelerate launch scripts/train.py --recipe quickstart`."""

from hf_zocl.commands.train import main


if __name__ == "__main__":
    main()
