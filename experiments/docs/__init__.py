"""What in docs/ is made by a command: measured numbers (`numbers.py`) and executed notebooks (`notebooks.py`)."""
