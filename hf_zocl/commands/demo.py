"""A page to try a run: an image, a slider over the tasks, and the probabilities after each task.

    python -m hf_zocl demo runs/quickstart
    python -m hf_zocl demo someone/a-repository --dataset_path path/to/dataset
    python -m hf_zocl demo someone/a-repository --push_space someone/a-demo

It needs Gradio: pip install "hf_zocl[demo]". The page is served to this machine only, unless --server_name says
otherwise. --push_space makes a Space on the Hub that shows the repository, or the one a run's folder was pushed to.
"""

import argparse
import logging
from pathlib import Path

from .door import Parser, command, require


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or its repository on the Hub")
    parser.add_argument("--dataset_path", help="a local copy of the run's dataset, for the test images")
    parser.add_argument("--server_name", default="127.0.0.1", help="the address to serve at; default: 127.0.0.1")
    parser.add_argument("--server_port", type=int, help="default: the first free port from 7860 on")
    parser.add_argument("--push_space", metavar="USER/NAME", help="push a Space with this page instead of serving it")
    parser.add_argument("--hub_token", help="default: HF_TOKEN, or the token of `hf auth login`")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="make a new Space private")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    require("gradio", "demo")
    if args.push_space is not None:
        from ..demo.space import push_demo

        print(f"Pushed to {push_demo(args.run, args.push_space, args.hub_token, args.hub_private_repo)}")
        return
    from ..demo.page import launch_page, make_page

    is_local = Path(args.run).is_dir()
    hub_kwargs = {} if is_local or args.hub_token is None else {"token": args.hub_token}
    launch_page(make_page(args.run, args.dataset_path, **hub_kwargs), args.server_name, args.server_port)
