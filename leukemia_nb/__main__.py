"""`python -m leukemia_nb` is the command line."""
from leukemia_nb.command_line import main

main()
