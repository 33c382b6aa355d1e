import OpenAI from "openai";

const client = new OpenAI({
  apiKey: process.env.INFERENCE_API_KEY,
  baseURL: "https://batch.inference.net/v1",
});

const inputFile = new File(
  [
    '{"custom_id":"chat-1","method":"POST","body":{"model":"meta-llama/llama-3.2-3b-instruct/fp-16","n":null,"temperature":null,"top_p":null,"messages":[{"role":"user","content":"What is the capital of France?"}]}}\n',
  ],
  "batch-input.jsonl",
  { type: "application/jsonl" },
);

const uploadedFile = await client.files.create({
  file: inputFile,
  purpose: "batch",
});

const batch = await client.batches.create({
  input_file_id: uploadedFile.id,
  endpoint: "/v1/completions",
  completion_window: "24h",
});

console.log(batch.id, batch.status);
