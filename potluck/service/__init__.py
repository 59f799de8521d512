"""Potluck as a service of this user: started when the computer is, and again should it fail."""
