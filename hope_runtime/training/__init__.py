"""What a native model is trained on: chats that were had, and facts that were made up."""
