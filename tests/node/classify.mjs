// Copyright 2026 The RBI authors. All rights reserved.
// SPDX-License-Identifier: Apache-2.0
//
// Classifies pictures with an exported model by the pipeline of transformers.js, and prints its answers as JSON.
//
//     node classify.mjs '{"folder": "export", "pictures": ["a.png"], "batches": [["a.png", "b.png"]], "dtype": "q8"}'
//
// Of each of the pictures by itself, then of each batch: [[{label, score}, ...], ...]. Without a dtype it is the one that
// the config asks for.

import path from 'node:path';

import { env, pipeline } from '@huggingface/transformers';

const { folder, pictures = [], batches = [], dtype = null } = JSON.parse(process.argv[2]);

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));

const classifier = await pipeline('image-classification', path.basename(folder), { dtype });
const alone = [];
for (const picture of pictures) {
    alone.push(await classifier(picture, { top_k: null }));
}
const together = [];
for (const batch of batches) {
    together.push(await classifier(batch, { top_k: null }));
}
console.log(JSON.stringify({ alone, together }));
