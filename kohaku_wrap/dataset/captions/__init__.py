"""From tags to captions: groups and words, millions of posts at once, in the forms that trainers read."""
