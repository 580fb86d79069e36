// Copyright 2026 The RBI authors. All rights reserved.
// SPDX-License-Identifier: Apache-2.0
//
// Classifies images with an exported model in the pipeline of transformers.js, and prints the predictions as JSON.
//
//     node classify.mjs '{"folder": "export", "images": ["a.png"], "batches": [["a.png", "b.png"]], "dtype": "q8"}'
//
// The output has the predictions for each image alone, and for each batch: [[{label, score}, ...], ...]. Without a dtype,
// transformers.js uses the dtype of the config.

import path from 'node:path';

import { env, pipeline } from '@huggingface/transformers';

const { folder, images = [], batches = [], dtype = null } = JSON.parse(process.argv[2]);

env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));

const classifier = await pipeline('image-classification', path.basename(folder), { dtype });
const alone = [];
for (const image of images) {
    alone.push(await classifier(image, { top_k: null }));
}
const together = [];
for (const batch of batches) {
    together.push(await classifier(batch, { top_k: null }));
}
console.log(JSON.stringify({ alone, together }));
