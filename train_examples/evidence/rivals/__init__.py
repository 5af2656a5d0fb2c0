"""What others have published, and how it compares with memwatch on the same items."""
