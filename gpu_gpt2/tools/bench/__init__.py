"""Times ops and training steps, lists what each kernel needs of a GPU, and keeps the results."""
