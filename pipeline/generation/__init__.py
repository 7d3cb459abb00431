"""What generators make of what was retrieved: messages are sent, answers kept, scored, or searched again."""
