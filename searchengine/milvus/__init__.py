"""An index in Milvus: the same searches as in a folder, for libraries that outgrow one machine."""
