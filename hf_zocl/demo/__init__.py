"""The page to try a run with: `python -m hf_zocl demo RUN_OR_REPO`. `page.py` alone needs Gradio."""
