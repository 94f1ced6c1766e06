"""Reading shards from S3 beside WebDataset, MosaicML Streaming, litData and Megatron Energon: `benchmarks.data.run`.

The peers that are installed are measured, and the result names the others as missing. Some want other versions of
numpy and of transformers than they need here, so that they are installed without what they depend on:

    pip install --no-deps mosaicml-streaming litdata megatron-energon lightning-utilities obstore tifffile filetype
    pip install rapidyaml multi-storage-client catalogue python-snappy cramjam xxhash zstd brotli mfusepy
"""
