"""The page to try a run: `python -m hf_zocl demo RUN_OR_REPO`. Only `page.py` needs Gradio."""
